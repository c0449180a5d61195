"""Between JSON and the attrs classes of commands: arguments are checked strictly, results are spelled with wire names.

Models QAPI's input and output visitors; the checking itself is `qblock.options.visit`, which drivers' options use too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qblock import options

if TYPE_CHECKING:
    from qblock.driver import Json


def arguments(cls: type[Any], given: Mapping[str, Json]) -> Any:
    """An instance of the frozen attrs class ``cls``; raises `InvalidParameter` naming the member by its path."""
    return options.visit(cls, given)


def reply(value: Any) -> Json:
    """``value`` as JSON: None (a command without result) is ``{}``, attrs objects lose their absent members."""
    return {} if value is None else options.dump(value)
