"""ONNX Runtime's telemetry stays off, wherever a package of ours leads to its import.

From version 1.32 on it writes a device id and an event store into the user's cache when it is imported, and
`disable_telemetry_events()` comes too late. So this is the one thing here that happens at import. Processes that are
started inherit it; a value that the user has set stays.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
