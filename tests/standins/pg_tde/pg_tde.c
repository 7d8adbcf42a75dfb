/* A stand-in for pg_tde: parameters, the access method, and the way to keyring.py, which has the rest.
 *
 * IT ENCRYPTS NOTHING. README.md names the source of each behaviour, or says that it is assumed.
 */
#include "postgres.h"

#include "access/tableam.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/guc.h"

#include "common/base64.h"
#include "lib/stringinfo.h"

PG_MODULE_MAGIC;

static bool inherit_global_providers = true;
static bool wal_encrypt = false;
static bool enforce_encryption = false;
static int	cipher = 0;

static const struct config_enum_entry ciphers[] = {{"aes_128", 0, false}, {"aes_256", 1, false}, {NULL, 0, false}};

/* Run keyring.py with a request; its answer, one line of JSON. Not in a transaction's hands: what it does stays done. */
static char *
ask(const char *request)
{
	int			length = pg_b64_enc_len(strlen(request));
	char	   *encoded = palloc0(length + 1);
	char		buffer[4096];
	size_t		got;
	int			status;
	StringInfoData answer;
	FILE	   *pipe;

	if (pg_b64_encode(request, strlen(request), encoded, length) < 0)
		elog(ERROR, "could not encode the request");
	initStringInfo(&answer);
	pipe = OpenPipeStream(psprintf("%s %s", KEYRING, encoded), "r");
	if (pipe == NULL)
		ereport(ERROR, errcode_for_file_access(), errmsg("could not run %s: %m", KEYRING));
	while ((got = fread(buffer, 1, sizeof(buffer), pipe)) > 0)
		appendBinaryStringInfo(&answer, buffer, got);
	status = ClosePipeStream(pipe);
	if (status != 0 || answer.len == 0)
		ereport(ERROR, errmsg("%s failed with status %d after %d bytes, see the server's log", KEYRING, status, answer.len));
	return answer.data;
}

PG_FUNCTION_INFO_V1(pg_tde_standin_ask);
Datum
pg_tde_standin_ask(PG_FUNCTION_ARGS)
{
	PG_RETURN_TEXT_P(cstring_to_text(ask(text_to_cstring(PG_GETARG_TEXT_PP(0)))));
}

PG_FUNCTION_INFO_V1(pg_tdeam_handler);
Datum
pg_tdeam_handler(PG_FUNCTION_ARGS)
{
	PG_RETURN_POINTER(GetHeapamTableAmRoutine());
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR, errmsg("%s can only be loaded at server startup. Restart required.", NAME));
	DefineCustomBoolVariable(NAME ".inherit_global_providers", "Allow using global key providers for databases.", NULL,
							 &inherit_global_providers, true, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable(NAME ".wal_encrypt", "Enable/Disable encryption of WAL.", NULL,
							 &wal_encrypt, false, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable(NAME ".enforce_encryption", "Only allow the creation of encrypted tables.", NULL,
							 &enforce_encryption, false, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable(NAME ".cipher", "TDE encryption algorithm.", NULL,
							 &cipher, 0, ciphers, PGC_SUSET, 0, NULL, NULL, NULL);
	ereport(LOG, errmsg("this is a stand-in for %s: IT ENCRYPTS NOTHING", NAME));
	if (wal_encrypt)
	{
		/* The postmaster may not open pipes as a backend does: the answer comes by the exit code, its words in the log. */
		char	   *request = psprintf("{\"call\": \"start\", \"data\": \"%s\"}", DataDir);
		int			length = pg_b64_enc_len(strlen(request));
		char	   *encoded = palloc0(length + 1);

		if (pg_b64_encode(request, strlen(request), encoded, length) < 0 ||
			system(psprintf("%s %s >&2", KEYRING, encoded)) != 0)
			ereport(FATAL, errmsg("WAL encryption is on, and the server key could not be had"));
	}
}
