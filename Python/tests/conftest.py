from __future__ import annotations

import faulthandler

# A test that hangs says where, and ends.
faulthandler.enable()
