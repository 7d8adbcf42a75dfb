# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  kmip_service:
    description:
      - The name under which the target knows the key management service, in keyslots, in the journal and in the cluster's record.
      - It stays when servers, certificates or addresses change. Without it V(kmip), or the one service that the cluster's record names.
    type: str
  kmip_servers:
    description:
      - The service's KMIP servers, C(host) or C(host:port), the first to be used first. The port is 5696 if it is not given.
      - The next one is asked if one does not take a connection or does not answer in time, never after a refusal.
    type: list
    elements: str
  kmip_ca:
    description:
      - File on the target with the certificates (PEM) of the authorities that the servers' certificates come from. No other authority is believed.
      - The servers' certificates must be for the host names in O(kmip_servers).
    type: path
  kmip_certificate:
    description: File on the target with the client's certificate (PEM).
    type: path
  kmip_certificate_key:
    description: File on the target with its key (PEM, not encrypted), root's own, mode 0600.
    type: path
  kmip_timeout:
    description: Seconds for a connection, and for each request. Without it 10.
    type: float
requirements:
  - PyKMIP 0.11 or newer on the target, for whoever uses a KMIP server; the role P(hsm.tde.prerequisites#role) installs it
"""
