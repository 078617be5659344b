"""Beyond one machine: how many replicas traffic takes, batches, comparisons and the service on Ray.

Nothing here is imported without being asked for, since SimPy and Ray come with the ``cluster`` extra.
"""

INSTALL = "pip install 'multimodal[cluster]'"
