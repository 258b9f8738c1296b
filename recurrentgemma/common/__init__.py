"""What both twins share: configuration, layer spec, reference, text. Imports no framework."""
