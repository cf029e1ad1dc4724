"""The claims of the Coherent Gradients theory, measured: `python -m experiments <name> --help`."""
