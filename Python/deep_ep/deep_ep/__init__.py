"""`swiftep.deep_ep` under the name that DeepEP has."""

import sys

import swiftep.deep_ep

for name in ("", ".buffer", ".utils"):
    sys.modules[__name__ + name] = sys.modules["swiftep.deep_ep" + name]
