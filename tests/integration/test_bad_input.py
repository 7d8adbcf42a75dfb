# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The checklist of bad input, and which tests hold each item through the real modules.

A test in the list asserts the error code and its cause; a message that names the object, what was kept and the next
step (``refusals.clear``); and that state, token, directories and catalogs are as they were (``refusals.unchanged``, or
``Estate.refused`` of the engine's tests, which does both). Units of the format, of the options and of the planner have tests
beside these; the list is of what a user sees.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TOKEN, STORE, PLACE, PLAY = (f"test_bad_input_{subject}" for subject in ("token", "store", "place", "play"))
TABLESPACES, CLUSTER = "test_engine_tablespaces", "test_engine_cluster"

DAMAGED = (STORE, "test_a_store_that_is_not_as_it_was_written_opens_nothing")

#: Item, and where it is held: file and test.
ITEMS: dict[str, list[tuple[str, str]]] = {
    "wrong PIN: once, then never again until it changes": [
        (TOKEN, "test_a_wrong_pin_is_tried_once_and_never_again_until_it_changes"),
        (TOKEN, "test_a_new_keystore_is_refused_before_its_first_step"),
        (CLUSTER, "test_wrong_credentials_change_nothing_and_a_wrong_pin_is_tried_once"),
        ("test_command", "test_a_refused_pin_is_not_tried_again_and_says_so"),
    ],
    "locked PIN": [(TOKEN, "test_a_locked_pin_is_not_tried")],
    "PIN that YAML read as a number": [
        (TOKEN, "test_a_secret_that_yaml_read_as_a_number_is_not_tried"),
        (PLAY, "test_a_pin_that_yaml_read_as_a_number_is_refused_by_modules_and_roles"),
    ],
    "missing, unreadable or wrong-architecture library": [
        (TOKEN, "test_a_library_that_cannot_be_loaded"),
        (TOKEN, "test_a_library_whose_configuration_is_missing"),
    ],
    "no token, two tokens with the label": [
        (TOKEN, "test_no_token_and_two_tokens_of_the_label"),
        (TOKEN, "test_a_token_that_is_not_finished"),
        (PLAY, "test_the_role_that_makes_a_token_takes_the_number_of_its_slot"),
    ],
    "token folder that is not mounted": [
        (TOKEN, "test_a_folder_of_tokens_that_is_not_mounted_leads_to_nothing_new"),
        (PLACE, "test_a_token_that_is_not_mounted_leads_to_no_tablespace"),
        (CLUSTER, "test_after_a_reboot_the_recovery_keyslot_opens_it_where_the_token_is_missing"),
    ],
    "PIN too short or long for the token": [(TOKEN, "test_a_pin_of_impossible_length_is_not_tried"), (TOKEN, "test_no_pin")],
    "key label that exists with other attributes": [
        (TOKEN, "test_a_key_of_the_label_with_other_attributes_is_left_as_it_is"),
        (TOKEN, "test_a_foreign_key_under_the_master_key_s_label_is_not_used"),
    ],
    "token without the needed mechanism": [
        (TOKEN, "test_a_token_without_the_mechanisms_gets_no_key"),
        (TOKEN, "test_a_mechanism_that_the_token_lacks"),
    ],
    "store file truncated": [DAMAGED],
    "store file bit-flipped": [DAMAGED],
    "store file of another cluster": [DAMAGED],
    "store file rolled back": [DAMAGED, (STORE, "test_a_rolled_back_store_is_not_written_anew")],
    "store file with a foreign keyslot": [DAMAGED],
    "store file with edited metadata": [DAMAGED, (STORE, "test_a_journal_or_record_that_was_changed")],
    "store file of a newer version": [DAMAGED],
    "store file with wrong owner or mode": [DAMAGED, (STORE, "test_a_state_directory_that_others_could_change")],
    "store file behind a symlink": [DAMAGED],
    "store file with absurd scrypt parameters": [DAMAGED],
    "wrong passphrase": [(STORE, "test_a_wrong_passphrase")],
    "file system without encryption": [
        (PLACE, "test_a_file_system_that_cannot_encrypt"),
        (TABLESPACES, "test_what_cannot_be_a_place_is_refused"),
    ],
    "non-empty directory": [
        (PLACE, "test_a_directory_that_is_in_use"),
        (PLACE, "test_an_image_over_a_folder_with_files_or_in_a_file_that_is_not_ours"),
        (TABLESPACES, "test_what_cannot_be_a_place_is_refused"),
    ],
    "location inside PGDATA": [(TABLESPACES, "test_what_cannot_be_a_place_is_refused")],
    "parent owned by the database's user": [
        (PLACE, "test_a_parent_that_the_database_s_user_owns"),
        (TABLESPACES, "test_what_cannot_be_a_place_is_refused"),
    ],
    "disk full while a key is written": [
        (PLACE, "test_a_disk_that_is_full_while_a_key_is_written_loses_none_and_makes_no_second"),
        (PLACE, "test_no_key_is_made_that_nobody_would_remember"),
    ],
    "PostgreSQL down": [
        (PLACE, "test_a_server_that_does_not_answer"),
        (TABLESPACES, "test_a_server_that_is_down_not_ours_or_not_willing"),
    ],
    "PostgreSQL without privilege": [(TABLESPACES, "test_a_server_that_is_down_not_ours_or_not_willing")],
    "PostgreSQL a standby": [(TABLESPACES, "test_a_standby_is_refused")],
    "a second run at the same time": [
        (PLACE, "test_a_second_run_waits_for_nobody_and_begins_nothing"),
        (PLACE, "test_two_runs_that_start_together_make_one_keystore"),
    ],
    "--check on a host where nothing is installed": [
        (PLAY, "test_check_mode_on_a_host_where_nothing_is_installed"),
        (PLAY, "test_without_check_mode_the_missing_libraries_are_named"),
    ],
    "a misspelt option beside a PIN at -vvv": [
        (PLAY, "test_options_misspelt_beside_a_pin_show_no_secret_at_vvv"),
        (PLAY, "test_an_option_misspelt_beside_a_pin_shows_no_secret"),
    ],
}


@pytest.mark.parametrize("item", ITEMS)
def test_every_item_is_held_by_tests_that_exist(item: str) -> None:
    for file, test in ITEMS[item]:
        tree = ast.parse((Path(__file__).with_name(f"{file}.py")).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_no_test_of_bad_input_is_left_out() -> None:
    listed = {row for rows in ITEMS.values() for row in rows}
    for subject in (TOKEN, STORE, PLACE, PLAY):
        tree = ast.parse((Path(__file__).with_name(f"{subject}.py")).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert (subject, node.name) in listed
