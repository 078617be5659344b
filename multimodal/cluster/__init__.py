"""Beyond one machine: how many replicas traffic takes, batches on Ray Data, the service on Ray Serve.

Nothing here is imported without being asked for, since SimPy and Ray come with the ``cluster`` extra.
"""

INSTALL = "pip install 'multimodal[cluster]'"
