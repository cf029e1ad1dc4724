"""The claims of the Coherent Gradients theory, measured: `python -m experiments <name> --help`.

A wheel holds this package as `cg_jax_experiments`, whose command is `cg-jax <name>`: modules import one another
relatively.
"""

import sys


def command() -> None:
    """The command `cg-jax`."""
    try:
        from . import __main__
    except ModuleNotFoundError as error:
        sys.exit(f"Expected the extra experiments, which cg-jax needs: {error}; pip install 'cg_jax[experiments]'")
    __main__.command("cg-jax")
