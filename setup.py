"""What pyproject.toml cannot say: the recipes of configs/ are the package `steerjax.recipes`."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["steerjax*"]), "steerjax.recipes"],
    package_dir={"steerjax.recipes": "configs"},
)
