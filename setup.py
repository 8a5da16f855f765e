"""The shim that older installers need; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
