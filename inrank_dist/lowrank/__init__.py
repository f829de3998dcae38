"""The mathematics of incremental low-rank learning. This package imports only torch.

Notation in this package: a linear layer has the weight ``W = a * W0 + U @ V.T`` with ``U: (out, R)`` and
``V: (in, R)``. A mode is a column of ``U`` together with the same column of ``V``. ``r`` is the active rank. ``R >= r``
is the number of modes that are trained: the active rank plus the buffer. ``sigma`` denotes the singular values of
``U @ V.T`` in descending order. The rank dimension is the last dimension of both factors and is never sharded.
"""
