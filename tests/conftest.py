from __future__ import annotations

import signal
import threading

# Whoever starts the tests in the background may have them ignore SIGINT, and what they start would ignore it too.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
