/* The file of key management systems, and the custom plug-in that one of its lines names. */
#include "keystore.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECONDS 30

/* One line a system: `custom NAME PLUGIN [kms-secret-obf=FILE] [arg=ARGUMENT]...` or `kmip NAME ...`. */
static const char *
parse(Kms *kms, const char *plugin_path)
{
	char	   *rest = kms->line;
	char	   *word;
	size_t		words = 0, arguments = 0;

	while ((word = strsep(&rest, " \t\n")) != NULL)
	{
		if (*word == '\0')
			continue;
		if (words == 0)
			snprintf(kms->type, sizeof(kms->type), "%s", word);
		else if (words == 1)
			snprintf(kms->name, sizeof(kms->name), "%s", word);
		else if (strcmp(kms->type, "custom") != 0)
			break;				/* kmip: not imitated, so not read */
		else if (words == 2 && strchr(word, '/') != NULL)
			return reason("the plug-in \"%s\" must be the name of a file in tde_kms.plugin_path", word);
		else if (words == 2)
			snprintf(kms->plugin, sizeof(kms->plugin), "%s/%s", plugin_path, word);
		else if (strncmp(word, "arg=", 4) == 0)
		{
			if (arguments + 2 > sizeof(kms->arguments) / sizeof(kms->arguments[0]))
				return reason("too many arguments for \"%s\"", kms->name);
			kms->arguments[arguments++] = word + 4;
		}
		else if (strncmp(word, "kms-secret-obf=", 15) == 0)
			snprintf(kms->obfuscated, sizeof(kms->obfuscated), "%s", word + 15);
		else
			return reason("unknown word \"%s\" in the line of \"%s\"", word, kms->name);
		words++;
	}
	if (strcmp(kms->type, "kmip") != 0 && strcmp(kms->type, "custom") != 0)
		return reason("unknown type of key management system \"%s\"", kms->type);
	if (strcmp(kms->type, "custom") == 0 && words < 3)
		return reason("the line of \"%s\" names no plug-in", kms->name);
	return NULL;
}

const char *
kms_lookup(const char *file, const char *plugin_path, const char *name, Kms *kms)
{
	const char *wrong = NULL;
	FILE	   *handle = fopen(file, "r");

	if (handle == NULL)
		return reason("could not open \"%s\": %s", file, strerror(errno));
	for (;;)
	{
		memset(kms, 0, sizeof(*kms));
		if (fgets(kms->line, sizeof(kms->line), handle) == NULL)
		{
			wrong = reason("\"%s\" names no key management system \"%s\"", file, name);
			break;
		}
		if (kms->line[strspn(kms->line, " \t\n")] == '\0' || kms->line[0] == '#')
			continue;
		if ((wrong = parse(kms, plugin_path)) != NULL || strcmp(kms->name, name) == 0)
			break;
	}
	fclose(handle);
	if (wrong == NULL && strcmp(kms->type, "kmip") == 0)
		wrong = reason("\"%s\" is of type kmip, which the stand-in does not imitate", name);
	return wrong;
}

static void
become_plugin(const Kms *kms, const char *verb, const char *key_id, const char *secret, int in, int out, int err)
{
	char	   *argv[40];
	size_t		count = 0;
	sigset_t	none;

	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	dup2(in, 0);
	dup2(out, 1);
	dup2(err, 2);
	/* The server's files and sockets are none of the plug-in's business. */
	for (int fd = 3; fd < 1024; fd++)
		close(fd);
	argv[count++] = (char *) kms->plugin;
	argv[count++] = (char *) verb;
	argv[count++] = "--keyid";
	argv[count++] = (char *) key_id;
	for (size_t i = 0; kms->arguments[i] != NULL; i++)
		argv[count++] = kms->arguments[i];
	argv[count] = NULL;
	if (secret != NULL)
		setenv("TDE_KMS_SECRET", secret, 1);
	else
		unsetenv("TDE_KMS_SECRET");
	execv(kms->plugin, argv);
	dprintf(2, "could not run \"%s\": %s", kms->plugin, strerror(errno));
	_exit(127);
}

static long
milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Read both outputs to their ends; false when time is up. */
static bool
collect(int out, int err, char *output, size_t output_size, size_t *output_length, char *message, size_t message_size)
{
	struct pollfd ends[2] = {{out, POLLIN, 0}, {err, POLLIN, 0}};
	char	   *places[2] = {output, message};
	size_t		sizes[2] = {output_size, message_size - 1};
	size_t		lengths[2] = {0, 0};
	char		surplus[512];
	long		deadline = milliseconds() + SECONDS * 1000;
	int			open_ends = 2;

	while (open_ends > 0)
	{
		long		left = deadline - milliseconds();

		if (left <= 0)
			return false;
		if (poll(ends, 2, left) < 0)
			continue;
		for (int i = 0; i < 2; i++)
		{
			bool		full = lengths[i] >= sizes[i];
			ssize_t		got;

			if (ends[i].fd < 0 || ends[i].revents == 0)
				continue;
			got = read(ends[i].fd, full ? surplus : places[i] + lengths[i], full ? sizeof(surplus) : sizes[i] - lengths[i]);
			if (got > 0)
				lengths[i] += full ? 0 : (size_t) got;
			else if (got == 0 || errno != EINTR)
			{
				ends[i].fd = -1;
				open_ends--;
			}
		}
	}
	*output_length = lengths[0];
	message[lengths[1]] = '\0';
	return true;
}

const char *
plugin_run(const Kms *kms, const char *verb, const char *key_id, const char *secret,
		   const void *input, size_t input_length, void *output, size_t output_size, size_t *output_length)
{
	char		message[512] = "";
	int			in[2], out[2], err[2];
	int			status = 0;
	bool		ended;
	pid_t		child;

	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
		return reason("pipe: %s", strerror(errno));
	child = fork();
	if (child < 0)
		return reason("fork: %s", strerror(errno));
	if (child == 0)
		become_plugin(kms, verb, key_id, secret, in[0], out[1], err[1]);
	close(in[0]);
	close(out[1]);
	close(err[1]);
	/* Shorter than a pipe's buffer. The server ignores SIGPIPE: a plug-in that reads nothing is found by its answer. */
	if (input_length > 0 && write(in[1], input, input_length) < 0)
		message[0] = '\0';
	close(in[1]);
	ended = collect(out[0], err[0], output, output_size, output_length, message, sizeof(message));
	close(out[0]);
	close(err[0]);
	if (!ended)
		kill(child, SIGKILL);
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	message[strcspn(message, "\n")] = '\0';
	if (!ended)
		return reason("the plug-in of \"%s\" did not answer %s within %d seconds", kms->name, verb, SECONDS);
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
		return reason("the plug-in of \"%s\" refused %s with status %d: %s", kms->name, verb,
					  WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), message);
	return NULL;
}
