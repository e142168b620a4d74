"""What model cards say about a family that its models cannot tell themselves."""
