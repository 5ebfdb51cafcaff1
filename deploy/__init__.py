"""How it is run: settings, command line, roles on Ray, status and report. Imports everything; nothing imports it.

Reading order: config, roles, launcher, cli, demo.
"""
