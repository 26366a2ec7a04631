// Stands for libcuda.so.1: the calls that smr.shim.gpu.driver makes, over files of the folder $SMR_FAKE_CUDA. The tests compile it.
//
// What begins with PID lies in /proc/PID/root/fake-cuda where there is such a folder, under the pid that the process has in its own
// namespace: so it goes with a container, into a checkpoint and out of it. Such a process has fault.CALL.nsPID too.
//
//   PID.state             0 running, 1 locked, 2 checkpointed, 3 failed; none: the process has no CUDA
//   PID.thread            its restore thread; none: its first thread
//   PID.asks              there: the restore thread has to take part in checkpoint, restore and unlock (see threads.c)
//   PID.ask, PID.answer   what this library asks of it: it renames the first to the second, when it runs
//   PID.pairs             the GPU pairs of the last restore, in hexadecimal
//   fault.CALL.PID        what is to happen instead; CALL: init (PID 0), state, thread, lock, checkpoint, restore, unlock. Words:
//                           once        remove this file first
//                           wait MS     first take so long
//                           fail N      return N and change nothing
//                           hang        never return
//                           late MS     change the state after so long, never return
//                           kill        kill the process and return 304
//                           die         kill the caller
//   log                   "CALL PID begin|end NS CALLER" a line, in order; NS of CLOCK_MONOTONIC
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OPERATING_SYSTEM = 304, ILLEGAL_STATE = 401, NOT_READY = 600 };

static char *path(char *out, size_t size, const char *format, ...)
{
	va_list words;
	int used = snprintf(out, size, "%s/", getenv("SMR_FAKE_CUDA"));
	va_start(words, format);
	vsnprintf(out + used, size - used, format, words);
	va_end(words);
	return out;
}

static int innermost(int pid)
{
	char name[64], line[256];
	int found = pid;
	snprintf(name, sizeof(name), "/proc/%d/status", pid);
	FILE *file = fopen(name, "re");
	while (file && fgets(line, sizeof(line), file))
		if (!strncmp(line, "NSpid:", 6))
			found = atoi(strrchr(line, '\t') + 1);
	if (file)
		fclose(file);
	return found;
}

// Where a process's own file lies; its pid there is returned.
static int own(char *out, size_t size, int pid, const char *what)
{
	int used = snprintf(out, size, "/proc/%d/root/fake-cuda", pid), number = pid;
	if (access(out, F_OK) == 0)
		number = innermost(pid);
	else
		used = snprintf(out, size, "%s", getenv("SMR_FAKE_CUDA"));
	snprintf(out + used, size - used, "/%d.%s", number, what);
	return number;
}

static int read_text(const char *name, char *out, size_t size)
{
	int fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t got = read(fd, out, size - 1);
	close(fd);
	out[got < 0 ? 0 : got] = 0;
	return 0;
}

static void write_text(const char *name, const char *text)
{
	// A reader sees the old or the new text, never none.
	char temporary[600];
	snprintf(temporary, sizeof(temporary), "%s.%d.%d", name, getpid(), gettid());
	int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, text, strlen(text)) < 0 || rename(temporary, name) < 0)
		abort();
	close(fd);
}

static void record(const char *call, int pid, const char *what)
{
	char line[200], name[512];
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	int length = snprintf(line, sizeof(line), "%s %d %s %lld %d\n", call, pid, what,
			      now.tv_sec * 1000000000LL + now.tv_nsec, getpid());
	int fd = open(path(name, sizeof(name), "log"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, line, length) != length)
		abort();
	close(fd);
}

static void sleep_ms(long ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000 };
	nanosleep(&time, NULL);
}

static int alive(int pid)
{
	char name[64], text[512];
	snprintf(name, sizeof(name), "/proc/%d/stat", pid);
	if (read_text(name, text, sizeof(text)) < 0)
		return 0;
	const char *end = strrchr(text, ')');
	return end && end[2] != 'Z' && end[2] != 'X';
}

static int state_of(int pid)
{
	char name[512], text[16];
	if (!alive(pid) || (own(name, sizeof(name), pid, "state"), read_text(name, text, sizeof(text)) < 0))
		return -1;
	return atoi(text);
}

static void set_state(int pid, int state)
{
	char name[512], text[16];
	snprintf(text, sizeof(text), "%d", state);
	own(name, sizeof(name), pid, "state");
	write_text(name, text);
}

// A process of a container's keeps its own state when it takes part, so that a caller that is killed cannot leave it wrong.
static int sets_itself(int pid)
{
	char name[512];
	return own(name, sizeof(name), pid, "asks") != pid && access(name, F_OK) == 0;
}

// The fault that is asked for: a CUresult to return, or -1 to go on; -2 to go on and then never return.
static int fault(const char *call, int pid)
{
	char name[512], text[128];
	int inner = own(name, sizeof(name), pid, "state");
	if (read_text(path(name, sizeof(name), "fault.%s.%d", call, pid), text, sizeof(text)) < 0 &&
	    (inner == pid || read_text(path(name, sizeof(name), "fault.%s.ns%d", call, inner), text, sizeof(text)) < 0))
		return -1;
	char *rest = text;
	for (char *word; (word = strtok_r(rest, " \n", &rest));) {
		if (!strcmp(word, "once"))
			unlink(name);
		else if (!strcmp(word, "wait"))
			sleep_ms(atol(strtok_r(rest, " \n", &rest)));
		else if (!strcmp(word, "fail"))
			return atoi(strtok_r(rest, " \n", &rest));
		else if (!strcmp(word, "late")) {
			sleep_ms(atol(strtok_r(rest, " \n", &rest)));
			return -2;
		} else if (!strcmp(word, "hang"))
			for (;;)
				pause();
		else if (!strcmp(word, "kill")) {
			kill(pid, SIGKILL);
			while (alive(pid))
				sleep_ms(1);
			return OPERATING_SYSTEM;
		} else if (!strcmp(word, "die"))
			kill(getpid(), SIGKILL);
	}
	return -1;
}

// The restore thread of the process does its part, when it can run.
static int asked(int pid, const char *call)
{
	char name[512], answer[512];
	own(name, sizeof(name), pid, "asks");
	if (access(name, F_OK) < 0)
		return OK;
	own(answer, sizeof(answer), pid, "answer");
	unlink(answer);
	own(name, sizeof(name), pid, "ask");
	write_text(name, call);
	char text[32] = "";
	// Another's call may still be under way, whose caller was killed.
	while (read_text(answer, text, sizeof(text)) < 0 || strcmp(text, call)) {
		if (!alive(pid))
			return OPERATING_SYSTEM;
		sleep_ms(1);
	}
	unlink(answer);
	return OK;
}

__attribute__((unused)) static int change(const char *call, int pid, int from, int to, int asks)
{
	record(call, pid, "begin");
	int result = fault(call, pid);
	int hangs = result == -2;
	if (result < 0) {
		int state = state_of(pid);
		result = state < 0 ? INVALID_VALUE : state != from ? ILLEGAL_STATE : asks ? asked(pid, call) : OK;
		if (result == OK && asks && sets_itself(pid))
			result = state_of(pid) == to ? OK : ILLEGAL_STATE;
		else if (result == OK)
			set_state(pid, to);
	}
	while (hangs)
		pause();
	record(call, pid, "end");
	return result;
}

int cuInit(unsigned flags)
{
	(void)flags;
	record("init", 0, "begin");
	printf("the library prints to stdout\n");
	fflush(stdout);
	int result = fault("init", 0);
	record("init", 0, "end");
	return result < 0 ? OK : result;
}

int cuDriverGetVersion(int *version)
{
	*version = 13000;
	return OK;
}

int cuGetErrorName(int number, const char **name)
{
	static __thread char text[64];
	snprintf(text, sizeof(text), "CUDA_ERROR_FAKE_%d", number);
	*name = text;
	return OK;
}

int cuGetErrorString(int number, const char **sentence)
{
	static __thread char text[64];
	snprintf(text, sizeof(text), "sentence of %d", number);
	*sentence = text;
	return OK;
}

#ifndef OLD_DRIVER
int cuCheckpointProcessGetState(int pid, int *state)
{
	record("state", pid, "begin");
	int result = fault("state", pid);
	if (result < 0) {
		*state = state_of(pid);
		result = *state < 0 ? INVALID_VALUE : OK;
	}
	record("state", pid, "end");
	return result;
}

int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
	char name[512], text[32];
	int result = fault("thread", pid);
	if (result >= 0)
		return result;
	if (state_of(pid) < 0)
		return INVALID_VALUE;
	own(name, sizeof(name), pid, "thread");
	*tid = read_text(name, text, sizeof(text)) < 0 ? pid : atoi(text);
	return OK;
}

int cuCheckpointProcessLock(int pid, const unsigned *args)
{
	return args && args[0] == 0 ? INVALID_VALUE : change("lock", pid, 0, 1, 0);
}

int cuCheckpointProcessCheckpoint(int pid, const void *args)
{
	(void)args;
	return change("checkpoint", pid, 1, 2, 1);
}

struct pairs {
	const unsigned char *pairs;
	unsigned count;
	char zeros[52];
};

int cuCheckpointProcessRestore(int pid, const struct pairs *args)
{
	if (args) {
		char name[512], text[4096] = "";
		for (size_t byte = 0; byte < args->count * 32ul; byte++)
			sprintf(text + strlen(text), "%02x", args->pairs[byte]);
		for (size_t byte = 0; byte < sizeof(args->zeros); byte++)
			if (args->zeros[byte])
				return INVALID_VALUE;
		own(name, sizeof(name), pid, "pairs");
		write_text(name, text);
	}
	return change("restore", pid, 2, 1, 1);
}

int cuCheckpointProcessUnlock(int pid, const void *args)
{
	(void)args;
	return change("unlock", pid, 1, 0, 1);
}
#endif
