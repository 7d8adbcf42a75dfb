/* Two commands of Fujitsu Enterprise Postgres: `pgx_keystore`, and `pg_ctl` with its further options.
 *
 * Secrets are typed on the terminal (or read from standard input where there is none) and reach the server
 * in a file without a name, neither on a command line nor in the environment.
 */
#include "keystore.h"

#include <errno.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int
pgx_keystore(int argc, char **argv)
{
	char		path[4096];
	char	   *location;
	char	   *passphrase;
	KeystoreFile file;
	const char *wrong;

	if (argc != 3 || strcmp(argv[1], "--enable-auto-open") != 0)
	{
		fprintf(stderr, "usage: pgx_keystore --enable-auto-open KEYSTORE_FILE\n");
		return 2;
	}
	snprintf(path, sizeof(path), "%s", argv[2]);
	location = dirname(path);
	wrong = keystore_read(location, "keystore.ks", &file);
	if (wrong == NULL && (passphrase = getpass("Enter the passphrase: ")) == NULL)
		wrong = "no passphrase";
	if (wrong == NULL && !passphrase_matches(&file, passphrase))
		wrong = "the passphrase is wrong";
	if (wrong == NULL)
		wrong = auto_open_write(location, &file);
	if (wrong != NULL)
	{
		fprintf(stderr, "pgx_keystore: %s\n", wrong);
		return 1;
	}
	printf("Automatic opening of the keystore is now enabled\n");
	return 0;
}

static void
pass_on(const char *secret)
{
	char		number[16];
	int			fd = memfd_create("secret", 0);

	if (fd < 0 || write(fd, secret, strlen(secret)) != (ssize_t) strlen(secret))
	{
		fprintf(stderr, "pg_ctl: %s\n", strerror(errno));
		exit(1);
	}
	snprintf(number, sizeof(number), "%d", fd);
	setenv("FEP_STANDIN_SECRET_FD", number, 1);
}

static int
pg_ctl(int argc, char **argv, const char *directory)
{
	char	  **kept = calloc(argc + 1, sizeof(char *));
	char		real[4096];
	char		self[4096];
	const char *secret = NULL;
	int			count = 1;

	for (int i = 1; i < argc; i++)
	{
		if (strcmp(argv[i], "--keystore-passphrase") == 0)
			secret = getpass("Enter the passphrase: ");
		else if (strcmp(argv[i], "--kms-secret") == 0)
			secret = getpass("Enter the KMS secret: ");
		else if (strcmp(argv[i], "-u") == 0 && i + 1 < argc)
			secret = argv[++i];
		else
			kept[count++] = argv[i];
	}
	if (secret != NULL)
		pass_on(secret);
	snprintf(self, sizeof(self), "%s/pg_ctl", directory);
	snprintf(real, sizeof(real), "%s/pg_ctl.postgresql", directory);
	kept[0] = self;
	execv(real, kept);
	fprintf(stderr, "pg_ctl: could not run \"%s\": %s\n", real, strerror(errno));
	return 1;
}

int
main(int argc, char **argv)
{
	char		directory[4096];
	ssize_t		length = readlink("/proc/self/exe", directory, sizeof(directory) - 1);

	if (length < 0)
		return 1;
	directory[length] = '\0';
	if (strcmp(basename(argv[0]), "pgx_keystore") == 0)
		return pgx_keystore(argc, argv);
	return pg_ctl(argc, argv, dirname(directory));
}
