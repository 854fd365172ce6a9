"""Profiles that ship with mtp_mem: one TOML file each, and `recorded/` with what was measured."""
