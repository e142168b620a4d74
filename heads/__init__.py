"""Task heads; each takes a list of feature maps and never names a backbone."""
