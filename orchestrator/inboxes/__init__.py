"""Inboxes: watched folders and bucket prefixes, whose complete files each start a pipeline once."""
