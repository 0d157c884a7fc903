"""From a YAML file and dotted overrides to a checked `Recipe`; every mistake becomes one line saying what is right."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
import yaml.constructor
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from arat_dist.config import Recipe, Section
from arat_dist.errors import UserError
from arat_dist.recipe_checks import check_fields

logger = logging.getLogger(__name__)


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Read a recipe file and lay dotted overrides over it.

    Args:
        path: a YAML file, or the name of a recipe that ships with the package.
        overrides: pairs of a dotted key and its value; strings are read as YAML.

    Raises:
        UserError: one line that names the file, the key and what would be right.
    """
    file = find_recipe(path)
    return parse_recipe(_read(file), overrides, source=str(file))


def _read(file: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file's sections, laid over those of the recipe that its `base` names, if it names one (UserError)."""
    file = file.resolve()
    if file in below:
        names = " -> ".join(path.name for path in [*below, file])
        raise UserError(f"{below[0]}: base: {names}: goes round in a circle")
    tree = read_mapping(file, "recipe")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{file}: base: {base!r}: a recipe's name or its file, beside this one, would be right")
    beside = file.parent / base
    return _laid_over(_read(beside if beside.is_file() else find_recipe(base), (*below, file)), tree)


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; `what` it is meant to be is for messages (UserError)."""
    try:
        tree = yaml.load(file.read_text(), Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a {what} is a mapping of sections, this holds {type(tree).__name__}")
    return tree


def _laid_over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key over those of a base; another objective takes no keys from the base's."""
    joined = dict(base)
    for section, keys in tree.items():
        before = base.get(section)
        if not isinstance(before, dict) or not isinstance(keys, dict) or _is_another_method(section, before, keys):
            joined[section] = keys
        else:
            joined[section] = {**before, **keys}
    return joined


def _is_another_method(section: str, before: dict[str, Any], keys: dict[str, Any]) -> bool:
    return section == "objective" and keys.get("name", before.get("name")) != before.get("name")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_recipe(
    tree: dict[str, Any], overrides: Iterable[tuple[str, Any]] = (), *, source: str = "recipe", quiet: bool = False
) -> Recipe:
    """Check a recipe given as nested mappings, with overrides as in `load_recipe` laid into them.

    Where another method or attack takes the place of one, the log says which keys go with it, unless `quiet`.

    Raises:
        UserError: one line that begins with `source`.
    """
    # Names first: changing one drops the keys of the old one, never those given beside it.
    for key, value in sorted(overrides, key=lambda override: override[0] not in _RENAMING):
        _override(tree, key, value, quiet=quiet)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_error(error)}") from error
    check_fields(recipe, source)
    return recipe


def shipped_recipes() -> Path:
    """Folder of the recipes that come with the package: inside it when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes that come with the package, sorted; those in folders as FOLDER/NAME."""
    return [name for name in _shipped_names() if not name.startswith("search/")]


def search_names() -> list[str]:
    """Names of all searches that come with the package, sorted, each as search/NAME."""
    return [name for name in _shipped_names() if name.startswith("search/")]


def _shipped_names() -> list[str]:
    shipped = shipped_recipes()
    return sorted(file.relative_to(shipped).with_suffix("").as_posix() for file in shipped.rglob("*.yaml"))


def find_recipe(path: str | Path) -> Path:
    """The recipe file that a user named: a path, or the name of a shipped one (UserError if neither)."""
    if (file := shipped_or_own(path)) is not None:
        return file
    known = [name for name in recipe_names() if "/" not in name]
    folders = sorted({f"{name.partition('/')[0]}/" for name in recipe_names() if "/" in name})
    raise UserError(
        f"{path}: no such recipe; a YAML file, one of {', '.join(known)}, or one under {', '.join(folders)} "
        "would be right"
    )


def shipped_or_own(path: str | Path) -> Path | None:
    """A file that exists, given by its path or by the name under which it ships; None where there is none."""
    shipped = shipped_recipes()
    name = str(path).removeprefix("recipes/")
    candidates = (Path(path), shipped / name, shipped / f"{name}.yaml")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def iter_keys() -> Iterator[tuple[str, str, str]]:
    """Every dotted key of the schema with its default and its docstring, for --help and for suggestions."""
    for section, field in Recipe.model_fields.items():
        for model in _section_models(field.annotation):
            for name, sub in model.model_fields.items():
                default = "required" if sub.is_required() else str(sub.get_default(call_default_factory=True))
                yield f"{section}.{name}", default, sub.description or ""


def _section_models(annotation: object) -> list[type[Section]]:
    """The section classes behind a field: one, or every objective of the union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [cast("type[Section]", part) for part in getattr(annotation, "__args__", ())]


# Another method or attack takes no keys of its own from the one before: all of them, or those named here.
_RENAMING: dict[str, tuple[str, ...]] = {"objective.name": (), "attack.name": ("step_size", "steps", "steps_from")}


def _override(tree: dict[str, Any], key: str, value: object, *, quiet: bool = False) -> None:
    """Set one dotted key. Another method or attack starts from its own defaults: the keys of the old one go."""
    parts = key.split(".")
    if len(parts) < 2:
        raise UserError(f"--{key}: a recipe key has a section, as in --train.epochs 10{_suggest(key)}")
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--{key}: {value!r} is not a YAML value") from None
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--{key}: {part} is not a section{_suggest(key)}")
    if key in _RENAMING and node.get("name") != value:
        own = _RENAMING[key] or tuple(node)
        dropped = [name for name in node if name in own and name != "name"]
        if dropped and not quiet:
            before = node.get("name", "the default")
            logger.warning("%s: %s in place of %s, whose keys go: %s", key, value, before, ", ".join(dropped))
        for name in dropped:
            del node[name]
    node[parts[-1]] = value


def _first_error(error: ValidationError) -> str:
    """One line for the first key that pydantic found wrong."""
    errors = error.errors()
    key = _error_key(errors[0])
    # A field that may be one of several types has an error for each of them.
    same = [each for each in errors if _error_key(each) == key]
    more = f" (and {len(errors) - len(same)} more)" if len(errors) > len(same) else ""
    return " ".join(f"{key}: {_error_message(same)}{more}".split())


def _error_key(error: ErrorDetails) -> str:
    """The dotted key of an error, as users know it."""
    # Names of types stand in the path of a union's errors, and the discriminator's tag in that of a tagged one.
    parts = [str(part) for part in error["loc"] if "[" not in str(part)]
    if parts[:1] == ["objective"] and len(parts) > 2:
        del parts[1]
    if error["type"].startswith("union_tag_"):
        parts.append("name")
    return ".".join(parts)


def _error_message(errors: list[ErrorDetails]) -> str:
    """What is wrong with the value of one key, and what would be right."""
    first = errors[0]
    match first["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden":
            owner = f" of {first['loc'][1]}" if first["loc"][0] == "objective" else ""
            return f"unknown key{owner}{_suggest(_error_key(first))}"
        case "union_tag_invalid" | "union_tag_not_found":
            given = f"{first['input']['name']!r}" if "name" in first["input"] else "missing"
            return f"{given}: one of {', '.join(_objective_names())} would be right"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{first['input']!r}: a section with keys below it would be right"
    texts = [each["msg"].removeprefix("Value error, ").replace("valid tuple", "list") for each in errors]
    return f"{first['input']!r}: {' or '.join(text[:1].lower() + text[1:] for text in texts)}"


def _objective_names() -> list[str]:
    """Every value of objective.name."""
    sections = _section_models(Recipe.model_fields["objective"].annotation)
    return [get_args(section.model_fields["name"].annotation)[0] for section in sections]


def _suggest(key: str) -> str:
    """The known key that was probably meant, as the end of a sentence, or nothing."""
    known = [*Recipe.model_fields, *(name for name, _, _ in iter_keys())]
    if key in known:
        return ""
    section, _, leaf = key.rpartition(".")
    elsewhere = [name for name in known if name.endswith(f".{leaf}")]
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    nearest = elsewhere or [siblings[close] for close in difflib.get_close_matches(leaf, siblings, n=1)]
    return f"; did you mean {nearest[0]}?" if nearest else ""
