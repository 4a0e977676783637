"""The far end of `process.py`: requests from stdin, replies to stdout, and bytes that were sent once.

Standard library and numpy only, and readable by Python 3.8: the DeepSparse worker loads this file under its own
interpreter.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Operation = Callable[[Mapping[str, Any]], Mapping[str, Any]]

PROTOCOL = 3  # of the requests and replies
KEPT_BYTES = 2**29


class Kept:
    """Bytes (models, samples) that were sent once, by sha256, so that later requests only name them.

    Above `limit_bytes` those that were named longest ago go, but never those that were named last.
    """

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._values: dict[str, bytes] = {}  # the one named longest ago first
        self._named: set[str] = set()

    def __getitem__(self, sha256: str) -> bytes:
        return self._values[sha256]

    def missing(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Operation: which of the bytes that a request is going to name have to be sent first."""
        self._named = set(request["sha256s"])
        for sha256 in self._named.intersection(self._values):
            self._values[sha256] = self._values.pop(sha256)
        return {"sha256s": [sha256 for sha256 in request["sha256s"] if sha256 not in self._values]}

    def keep(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Operation: keep the bytes that come with the request."""
        data = base64.b64decode(request["data"])
        if (found := hashlib.sha256(data).hexdigest()) != request["sha256"]:
            raise ValueError(f"{len(data)} bytes arrived with sha256 {found}, sent was {request['sha256']}; try again")
        self._values[request["sha256"]] = data
        surplus = sum(map(len, self._values.values())) - self._limit_bytes
        for sha256 in [name for name in self._values if name not in self._named]:
            if surplus > 0:
                surplus -= len(self._values.pop(sha256))
        return {}


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON: base64 of its bytes in C order, with type and shape."""
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def decode_array(document: Mapping[str, Any], kept: Kept | None = None) -> np.ndarray:
    """The array that `encode_array` wrote, or whose bytes are kept under the document's sha256."""
    import numpy as np

    data = kept[document["sha256"]] if kept and "sha256" in document else base64.b64decode(document["data"])
    return np.frombuffer(data, dtype=np.dtype(document["dtype"])).reshape(document["shape"]).copy()


def kind_attribute(exc: Exception) -> str:
    """The `kind` that an error's class has, or "failed"."""
    return getattr(exc, "kind", "failed")


def answer_all(
    operations: Mapping[str, Operation],
    *,
    at_end: Callable[[], None],
    kind_of: Callable[[Exception], str] = kind_attribute,
    first: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Answer requests for ever.

    Args:
        operations: by the name that requests give as "op".
        at_end: called when stdin ends, that is when the parent is gone; in another thread, also while an
            operation is busy. It must end the process.
        kind_of: names the kind of an error for its reply, see ERROR_KINDS.
        first: requests that were read already.
    """
    # Native logs go to stdout: keep the real one for replies, let them write to stderr.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue = queue.SimpleQueue()
    for request in first:
        requests.put(request)
    threading.Thread(target=_read_requests, args=(requests, at_end), daemon=True).start()
    while True:
        reply = _answer(requests.get(), operations, kind_of)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _answer(
    request: Mapping[str, Any], operations: Mapping[str, Operation], kind_of: Callable[[Exception], str]
) -> dict[str, Any]:
    """The reply to a request. Every failure becomes a reply: the parent decides what it means."""
    try:
        return {"id": request["id"], "result": operations[request["op"]](request)}
    except Exception as exc:
        kind = kind_of(exc)
        if kind == "failed":
            traceback.print_exc()  # to stderr, for whoever looks for the cause
        return {"id": request["id"], "error": {"kind": kind, "message": f"{exc}" or type(exc).__name__}}


def _read_requests(requests: queue.SimpleQueue, at_end: Callable[[], None]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    at_end()
