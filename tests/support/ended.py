"""A rank that ends before it has done anything. A process that is started anew imports only this."""

import os
from typing import Any


def end_at_once(*_: Any) -> None:
    os._exit(3)
