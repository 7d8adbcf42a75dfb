/* What of the stand-in for Fujitsu Enterprise Postgres needs no PostgreSQL: files, tokens, plug-ins.
 *
 * Every function that can fail gives NULL, or the reason as text that lives until the next call.
 */
#ifndef FEP_KEYSTORE_H
#define FEP_KEYSTORE_H

#include <stdbool.h>
#include <stddef.h>

#define KEY_ID_BYTES 16
#define KCV_BYTES 3
#define DEK_BYTES 32
#define SECRET_MAX 1024

/* What a keystore file holds. There is no key in it: the stand-in encrypts nothing. */
typedef struct KeystoreFile
{
	char		key[2 * KEY_ID_BYTES + 1];	/* identifies the master key */
	char		check[400];		/* crypt(3) of the passphrase; empty in keystore.aks and with tde_z */
	char		kcv[2 * KCV_BYTES + 1]; /* check value of the token's key; empty without tde_z */
	char		machine[400];	/* keystore.aks only: the machine that made it */
} KeystoreFile;

/* keystore.c */
extern const char *reason(const char *format,...) __attribute__((format(printf, 1, 2)));
extern void hex(const unsigned char *bytes, size_t length, char *text);
extern bool unhex(const char *text, unsigned char *bytes, size_t length);
extern const char *random_bytes(void *bytes, size_t length);
extern const char *this_machine(char *text, size_t size);
extern const char *write_private_file(const char *path, const void *content, size_t length);
extern const char *read_private_file(const char *path, void *content, size_t size, size_t *length);
extern const char *keystore_read(const char *location, const char *name, KeystoreFile *file);
extern const char *keystore_write(const char *location, const char *name, const KeystoreFile *file);
extern bool keystore_exists(const char *location, const char *name);
extern const char *passphrase_set(KeystoreFile *file, const char *passphrase);
extern bool passphrase_matches(const KeystoreFile *file, const char *passphrase);
extern const char *auto_open_write(const char *location, const KeystoreFile *file);

/* token.c: both log in to the token in a child process */
extern const char *token_create(long slot, const char *pin, const unsigned char *id, unsigned char *kcv);
extern const char *token_find(long slot, const char *pin, const unsigned char *id, unsigned char *kcv);

/* plugin.c */
typedef struct Kms
{
	char		type[16];		/* kmip or custom */
	char		name[64];
	char		plugin[1024];	/* absolute path */
	char		obfuscated[1024];	/* file of the credentials for opening at start, or empty */
	char	   *arguments[32];	/* NULL at the end */
	char		line[4096];		/* where the arguments are */
} Kms;

extern const char *kms_lookup(const char *file, const char *plugin_path, const char *name, Kms *kms);
extern const char *plugin_run(const Kms *kms, const char *verb, const char *key_id, const char *secret,
							  const void *input, size_t input_length, void *output, size_t output_size, size_t *output_length);

#endif
