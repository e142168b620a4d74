"""What ``zoo.tools.export`` is made of: reading the model, tracing it, and one file for every format."""
