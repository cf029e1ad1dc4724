"""The packages of the wheel; everything else is in setup.cfg.

`experiments/` is installed as `cg_jax_experiments`: its own name would be anybody's in site-packages. Its modules
import one another relatively, so both names work; setup.cfg cannot map a name beside a search for packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cg_jax", "cg_jax.*"]), "cg_jax_experiments"],
    package_dir={"cg_jax_experiments": "experiments"},
)
