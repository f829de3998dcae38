"""The mathematics of incremental low-rank learning; imports torch and nothing of this project.

Notation (shared by every file here). A linear layer has ``W = a * W0 + U @ V.T`` with ``U: (out, R)`` and
``V: (in, R)``. ``r`` is the active rank, ``R >= r`` the number of modes that exist and are trained (``r`` plus the
buffer), ``sigma`` the singular values of ``U @ V.T`` in descending order. The rank dimension is last and never sharded.
"""
