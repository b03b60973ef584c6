"""Where the packages lie; everything else is in pyproject.toml.

The folder ``kernels/`` is installed as ``sfm_fast.kernels``: a top-level package of that name would shadow another project's.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sfm_fast", "sfm_fast.*"]), "sfm_fast.kernels"],
    package_dir={"sfm_fast": "sfm_fast", "sfm_fast.kernels": "kernels"},
    package_data={"sfm_fast": ["py.typed", "data/assets/*"]},
)
