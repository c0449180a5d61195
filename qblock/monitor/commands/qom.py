"""Commands that look at objects: the tree of those that there are, and the types that there can be.

Models ``qom-list``, ``qom-get``, ``qom-set``, ``qom-list-types`` and ``qom-list-properties`` of QEMU 7.2; see `qom_tree` and
`qom_types` for what is in the tree.
"""

from __future__ import annotations

from typing import Any

import attrs

from qblock.driver import Json
from qblock.errors import DeviceNotFound
from qblock.monitor.command import CommandContext, command
from qblock.monitor.qom_tree import find_object
from qblock.monitor.qom_types import descends, object_types
from qblock.options import option, required


@attrs.frozen
class QomPathArguments:
    """Names an object of the tree."""

    path: str = required(doc="path of the object")


@attrs.frozen
class QomPropertyArguments(QomPathArguments):
    """Names a property."""

    property: str = required(doc="name of the property")


@attrs.frozen
class QomSetArguments(QomPropertyArguments):
    """Names a property and its new value."""

    value: Any = required(doc="new value")


@attrs.frozen
class ObjectPropertyInfo:
    """Entry of qom-list."""

    name: str = required(doc="name of the property")
    type: str = required(doc="its type; child<TYPE> for an object below")
    description: str | None = option(None, doc="what it is")
    default_value: Any = option(None, doc="its value if it is not set")


@attrs.frozen
class QomTypesArguments:
    """Arguments of qom-list-types."""

    implements: str | None = option(None, doc="only types that are of this one")
    abstract: bool | None = option(None, doc="also types of which nothing can be made")


@attrs.frozen
class TypeNameArguments:
    """Names a type."""

    typename: str = required(doc="the type")


@attrs.frozen
class ObjectTypeInfo:
    """Entry of qom-list-types."""

    name: str = required(doc="the type")
    abstract: bool | None = option(None, doc="true when nothing can be made of it")
    parent: str | None = option(None, doc="the type that it is a kind of")


@command("qom-list", since="1.2", returns=list[ObjectPropertyInfo])
async def qom_list(ctx: CommandContext, args: QomPathArguments) -> list[ObjectPropertyInfo]:
    """List the properties of an object."""
    found = find_object(ctx.hub, args.path)
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in found.properties().items()]


@command("qom-get", since="1.2", returns=Any)
async def qom_get(ctx: CommandContext, args: QomPropertyArguments) -> Json:
    """Tell the value of a property."""
    return find_object(ctx.hub, args.path).get(args.property)


@command("qom-set", since="1.2")
async def qom_set(ctx: CommandContext, args: QomSetArguments) -> None:
    """Change a property."""
    find_object(ctx.hub, args.path).set(args.property, args.value)


@command("qom-list-types", since="1.2", returns=list[ObjectTypeInfo])
async def qom_list_types(ctx: CommandContext, args: QomTypesArguments) -> list[ObjectTypeInfo]:
    """List the types that there are."""
    types = object_types(ctx.dialect)
    return [
        ObjectTypeInfo(name=found.name, abstract=found.is_abstract or None, parent=found.parent or None)
        for found in types.values()
        if (args.abstract or not found.is_abstract)
        and (args.implements is None or descends(types, found.name, args.implements))
    ]


@command("qom-list-properties", since="2.12", returns=list[ObjectPropertyInfo])
async def qom_list_properties(ctx: CommandContext, args: TypeNameArguments) -> list[ObjectPropertyInfo]:
    """List the properties of the objects of a type."""
    found = object_types(ctx.dialect).get(args.typename)
    if found is None:
        raise DeviceNotFound(args.typename)
    return [
        ObjectPropertyInfo(name="type", type="string"),
        *(ObjectPropertyInfo(name=prop.name, type=prop.kind, description=prop.doc or None) for prop in found.properties),
    ]
