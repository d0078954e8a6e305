"""All there is to say about the package is in pyproject.toml, but for this: the card's templates lie at the top of the
repository, where they are found, and go into the package, where they are used."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["hfquant*", "space_app", "optimum.commands.register"]),
        "hfquant.model_cards",
    ],
    package_dir={"hfquant.model_cards": "model_cards"},
)
