"""Who may do what: callers and how they are known, roles, projects, certificates, the audit log.

`cryofleet.server` applies it to every call; the command line makes tokens and certificates by it.
"""
