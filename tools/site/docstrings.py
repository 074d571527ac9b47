"""A griffe extension for mkdocstrings: roles and formulas of docstrings become Markdown, and their shared entries are filled in."""

import re
from collections.abc import Iterator

from griffe import AliasResolutionError, Class, Extension, Module, Object

from fastvae.functional._documentation import filled_in

_FORMULA = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_INLINE_FORMULA = re.compile(r":math:`([^`]+)`")
# griffe takes code and a colon at the beginning of this section for a type.
_RETURNED_CODE = re.compile(r"^(Returns:\n +``[^`\n]+``): ", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|data):`(~?)([^`]+)`")


class Markdown(Extension):
    """Rewrites every docstring of the package once it is read."""

    def on_package(self, *, pkg: Module, **_) -> None:
        for obj in objects(pkg):
            if obj.docstring is not None:
                obj.docstring.value = as_markdown(obj.docstring.value, obj)


def objects(obj: Object) -> Iterator[Object]:
    """An object and all that it contains, without what is imported."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from objects(member)


def as_markdown(docstring: str, obj: Object) -> str:
    text = _FORMULA.sub(_formula, filled_in(docstring))
    text = _RETURNED_CODE.sub(lambda section: f"{section[1]} \N{EN DASH} ", text)
    text = _INLINE_FORMULA.sub(lambda role: f"`#!math {' '.join(role[1].split())}`", text)
    return _ROLE.sub(lambda role: _reference(role[2], obj, is_short=bool(role[1])), text) + _fields(obj)


def _fields(obj: Object) -> str:
    """A sentence with the fields of a named tuple, for mkdocstrings leaves out attributes without a docstring."""
    if not isinstance(obj, Class) or "NamedTuple" not in map(str, obj.bases):
        return ""
    names = ", ".join(f"`{name}`" for name, member in obj.members.items() if member.is_attribute)
    return f"\n\nFields, in this order: {names}."


def _formula(directive: re.Match) -> str:
    """A formula with ``&`` is aligned there, as Sphinx has it."""
    indent, body = directive[1], " ".join(directive[2].split())
    if "&" in body:
        body = rf"\begin{{split}} {body} \end{{split}}"
    return f"\n{indent}```math\n{indent}{body}\n{indent}```\n"


def _reference(name: str, obj: Object, *, is_short: bool) -> str:
    """A name as code, which is a link where a page of the site documents it. ``~`` in a role leaves out the module."""
    shown = name.rpartition(".")[2] if is_short else name
    return f'<autoref optional identifier="{path_of(name, obj)}"><code>{shown}</code></autoref>'


def path_of(name: str, obj: Object) -> str:
    """The path of what a docstring names: a member of the object, inherited ones too, or of what the object is in, or a whole path."""
    head, dot, rest = name.partition(".")
    scope: Object | None = obj
    while scope is not None:
        members = scope.all_members if isinstance(scope, Class) else scope.members
        if head in members:
            try:
                return members[head].canonical_path + dot + rest
            except AliasResolutionError:
                return name
        scope = scope.parent
    return name
