"""Commands that look at the tree of objects: the properties of those that object-add has made.

Models ``qom-list``, ``qom-get`` and ``qom-set`` of QEMU 7.2 on ``/objects``; a path is absolute, or the end of one. Differs from
QEMU in that the tree has no machine with its devices in it, and no character devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from qblock.driver import Json
from qblock.errors import CommandError, DeviceNotFound
from qblock.monitor.command import CommandContext, command
from qblock.objects import UserObject
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
class _Container:
    """An object that only holds others."""

    children: Mapping[str, str]


def _at(ctx: CommandContext, path: str) -> UserObject | _Container:
    """What ``path`` names; raises `DeviceNotFound`."""
    objects = ctx.system.objects.objects
    match [part for part in path.split("/") if part], path.startswith("/"):
        case ["objects", name], _ if name in objects:
            return objects[name]
        case [name], False if name in objects:
            return objects[name]
        case ["objects"], _:
            return _Container({name: found.kind for name, found in objects.items()})
        case [], True:
            return _Container({"objects": "container"})
    raise DeviceNotFound(path)


@command("qom-list", since="1.2", returns=list[ObjectPropertyInfo])
async def qom_list(ctx: CommandContext, args: QomPathArguments) -> list[ObjectPropertyInfo]:
    """List the properties of an object."""
    found = _at(ctx, args.path)
    if isinstance(found, _Container):
        properties = {name: f"child<{kind}>" for name, kind in found.children.items()}
    else:
        properties = dict(found.properties)
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in {"type": "string", **properties}.items()]


@command("qom-get", since="1.2", returns=Any)
async def qom_get(ctx: CommandContext, args: QomPropertyArguments) -> Json:
    """Tell the value of a property."""
    found = _at(ctx, args.path)
    if args.property == "type":
        return "container" if isinstance(found, _Container) else found.kind
    return _with_property(found, args).get(args.property)


@command("qom-set", since="1.2")
async def qom_set(ctx: CommandContext, args: QomSetArguments) -> None:
    """Change a property."""
    found = _at(ctx, args.path)
    if args.property == "type":
        raise CommandError("The type of an object cannot be changed")
    _with_property(found, args).set(args.property, args.value)


def _with_property(found: UserObject | _Container, args: QomPropertyArguments) -> UserObject:
    if isinstance(found, _Container) or args.property not in found.properties:
        raise CommandError(f"'{args.path}' has no property '{args.property}' that could be used")
    return found
