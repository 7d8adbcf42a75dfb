/* The keystore's files: keystore.ks, keystore.aks and what else must be private. */
#include "keystore.h"

#include <crypt.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define FIRST_LINE "FEP stand-in keystore: ENCRYPTS NOTHING, holds no key"

const char *
reason(const char *format,...)
{
	static char text[1024];
	va_list		arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	return text;
}

void
hex(const unsigned char *bytes, size_t length, char *text)
{
	for (size_t i = 0; i < length; i++)
		snprintf(text + 2 * i, 3, "%02x", bytes[i]);
}

bool
unhex(const char *text, unsigned char *bytes, size_t length)
{
	if (strlen(text) != 2 * length)
		return false;
	for (size_t i = 0; i < length; i++)
		if (sscanf(text + 2 * i, "%2hhx", &bytes[i]) != 1)
			return false;
	return true;
}

const char *
random_bytes(void *bytes, size_t length)
{
	return getrandom(bytes, length, 0) == (ssize_t) length ? NULL : reason("no random bytes: %s", strerror(errno));
}

/* A machine is told by its machine-id and its name: containers of one image share the first. */
const char *
this_machine(char *text, size_t size)
{
	char		id[64] = "";
	char		name[256] = "";
	FILE	   *file = fopen("/etc/machine-id", "r");

	if (file != NULL)
	{
		if (fgets(id, sizeof(id), file) == NULL)
			id[0] = '\0';
		fclose(file);
	}
	id[strcspn(id, "\n")] = '\0';
	if (gethostname(name, sizeof(name) - 1) != 0)
		return reason("no host name: %s", strerror(errno));
	snprintf(text, size, "%s/%s", id, name);
	return NULL;
}

/* Only the user who starts the server may read it; a reader sees the old file or the new one. */
const char *
write_private_file(const char *path, const void *content, size_t length)
{
	char		temporary[4096];
	const char *wrong = NULL;
	int			fd;

	snprintf(temporary, sizeof(temporary), "%s.new", path);
	unlink(temporary);
	fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0)
		return reason("could not create \"%s\": %s", temporary, strerror(errno));
	if (write(fd, content, length) != (ssize_t) length || fsync(fd) != 0)
		wrong = reason("could not write \"%s\": %s", temporary, strerror(errno));
	close(fd);
	if (wrong == NULL && rename(temporary, path) != 0)
		wrong = reason("could not rename \"%s\": %s", temporary, strerror(errno));
	if (wrong != NULL)
		unlink(temporary);
	return wrong;
}

const char *
read_private_file(const char *path, void *content, size_t size, size_t *length)
{
	const char *wrong = NULL;
	ssize_t		got;
	int			fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return reason("could not open \"%s\": %s", path, strerror(errno));
	got = read(fd, content, size);
	if (got < 0)
		wrong = reason("could not read \"%s\": %s", path, strerror(errno));
	close(fd);
	*length = got < 0 ? 0 : (size_t) got;
	return wrong;
}

static void
file_path(const char *location, const char *name, char *path, size_t size)
{
	snprintf(path, size, "%s/%s", location, name);
}

bool
keystore_exists(const char *location, const char *name)
{
	char		path[4096];

	file_path(location, name, path, sizeof(path));
	return access(path, F_OK) == 0;
}

const char *
keystore_read(const char *location, const char *name, KeystoreFile *file)
{
	char		path[4096];
	char		content[4096];
	char	   *rest = content;
	char	   *line;
	size_t		length;
	const char *wrong;

	memset(file, 0, sizeof(*file));
	file_path(location, name, path, sizeof(path));
	if ((wrong = read_private_file(path, content, sizeof(content) - 1, &length)) != NULL)
		return wrong;
	content[length] = '\0';
	line = strsep(&rest, "\n");
	if (strcmp(line, FIRST_LINE) != 0)
		return reason("\"%s\" is not a keystore", path);
	while ((line = strsep(&rest, "\n")) != NULL)
	{
		if (sscanf(line, "key %32s", file->key) || sscanf(line, "check %399s", file->check)
			|| sscanf(line, "kcv %6s", file->kcv) || sscanf(line, "machine %399[^\n]", file->machine))
			continue;
	}
	return file->key[0] ? NULL : reason("\"%s\" is damaged", path);
}

const char *
keystore_write(const char *location, const char *name, const KeystoreFile *file)
{
	char		path[4096];
	char		content[2048];
	int			length;

	file_path(location, name, path, sizeof(path));
	length = snprintf(content, sizeof(content), "%s\nkey %s\n", FIRST_LINE, file->key);
	if (file->check[0])
		length += snprintf(content + length, sizeof(content) - length, "check %s\n", file->check);
	if (file->kcv[0])
		length += snprintf(content + length, sizeof(content) - length, "kcv %s\n", file->kcv);
	if (file->machine[0])
		length += snprintf(content + length, sizeof(content) - length, "machine %s\n", file->machine);
	return write_private_file(path, content, length);
}

const char *
passphrase_set(KeystoreFile *file, const char *passphrase)
{
	struct crypt_data data = {0};
	char		salt[CRYPT_GENSALT_OUTPUT_SIZE];

	if (crypt_gensalt_rn("$6$", 1000, NULL, 0, salt, sizeof(salt)) == NULL
		|| crypt_r(passphrase, salt, &data) == NULL)
		return reason("crypt: %s", strerror(errno));
	snprintf(file->check, sizeof(file->check), "%s", data.output);
	return NULL;
}

bool
passphrase_matches(const KeystoreFile *file, const char *passphrase)
{
	struct crypt_data data = {0};
	char	   *again = file->check[0] ? crypt_r(passphrase, file->check, &data) : NULL;

	return again != NULL && strcmp(again, file->check) == 0;
}

/* keystore.aks: the opened content, for this machine alone. */
const char *
auto_open_write(const char *location, const KeystoreFile *file)
{
	KeystoreFile opened = *file;
	const char *wrong = this_machine(opened.machine, sizeof(opened.machine));

	opened.check[0] = '\0';
	return wrong ? wrong : keystore_write(location, "keystore.aks", &opened);
}
