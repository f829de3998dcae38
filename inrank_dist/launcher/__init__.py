"""Launchers: start the processes of one node, with torch's elastic agent or with DeepSpeed's launcher."""
