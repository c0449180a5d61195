"""Encryption of disks, apart from any image format: ciphers over sectors, and LUKS headers with their key slots.

Everything here is computation on bytes: no module of it reads or writes a file.
"""
