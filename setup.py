"""Build of captum_dtd. Everything that is declarative stands in pyproject.toml."""

from setuptools import setup

setup()
