# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Fujitsu Enterprise Postgres: its own keystore, whose master key lies in a slot of openCryptoki, in a file or behind a plugin."""
