"""The demo page: upload a picture, ask, read the answer, and see where the model looked for it."""

import os

# Before anything imports Gradio, which would otherwise report its version and use to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
