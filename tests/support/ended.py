"""A rank that ends before it has done anything: of tests, its process imports only this module."""

import os
from typing import Any


def end_at_once(*_: Any) -> None:
    os._exit(3)
