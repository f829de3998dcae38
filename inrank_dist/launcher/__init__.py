"""Starting the processes of one node: what torchrun and the deepspeed launcher leave to the user."""
