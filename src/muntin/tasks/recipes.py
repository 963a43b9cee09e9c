"""Settings in YAML files: recipes that come with the package, a user's own, a run's config.yaml."""

from importlib import resources
from pathlib import Path
from typing import Any

from muntin.errors import UserError, nearest


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name; sweeps apart (`muntin.tasks.sweep`)."""
    folder = Path(str(resources.files("muntin"))) / "recipes"
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("sweeps/")}


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, by its name. Raises `UserError` naming those near."""
    known = recipes()
    if name not in known:
        raise UserError(f"there is no recipe {name!r}{nearest(name, known)}; see all with: muntin train --recipe list")
    return read_config(known[name])


def describe_recipes() -> str:
    """Every recipe with the first line of its header."""
    known = recipes()
    width = max(len(name) for name in known)
    heads = {name: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name, path in known.items()}
    return "\n".join(f"{name:<{width}}  {head}" for name, head in heads.items())


def read_config(given: str | Path) -> dict[str, Any]:
    """A YAML file of settings. Raises `UserError` naming the file."""
    import yaml

    path = Path(given)
    if not path.exists():
        hint = f"; the recipe of that name is given as --recipe {given}" if str(given) in recipes() else ""
        raise UserError(f"there is no configuration file {given}{hint}; give a YAML file of settings")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; give a YAML file of settings") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} is not a YAML mapping; write one setting per line, as in lr: 0.001")
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """One setting per line, in the order given."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
