"""Memory operators: what they are, and (one file each) the operators."""
