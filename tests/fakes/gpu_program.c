// What a container with a GPU runs in the tests: a process that has CUDA of the fake libcuda.c, and takes part in its calls as
// the real driver makes a process do. Usage: gpu_program [large] [second] [forked] [socket] [io_uring]
//
// While it runs it has NVIDIA's device files open, and contents in "GPU memory". At a checkpoint it brings the contents into
// memory of its own, frees the other, and closes the files; at a restore it opens the files that /dev has then and brings the
// contents back. From checkpoint to unlock no thread uses the GPU.
//
//   /fake-cuda          a folder of the container's own (tmpfs)
//   PID.counts          64 slots of 8 bytes, see below; PID.state, PID.thread, PID.asks, PID.ask, PID.answer: see libcuda.c
//   large               96 MiB of "GPU memory" in place of 24
//   second              another process, with CUDA of its own, begun before the first one's
//   forked              a child of the first process, which has its open files and no CUDA
//   socket, io_uring    open files that CRIU cannot dump
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { READY, TICKS, USES, BAD, MINORS, OPEN, CHECKPOINTS, RESTORES, UNLOCKS, TICKS_AT_RESTORE, BOOT };
enum { MOST_FILES = 64 };

static volatile uint64_t *slots;
static uint64_t *memory, *saved, seed, sum;
static size_t words = 3 << 20;
static volatile int held, away;
static int files[MOST_FILES], opened;
static pthread_mutex_t using = PTHREAD_MUTEX_INITIALIZER;

static void nap(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
}

static char *name_of(char *out, const char *what)
{
	sprintf(out, "/fake-cuda/%d.%s", getpid(), what);
	return out;
}

static void write_text(const char *what, const char *text)
{
	char name[64], temporary[64];
	int fd = open(name_of(temporary, "new"), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, text, strlen(text)) < 0 || rename(temporary, name_of(name, what)) < 0)
		abort();
	close(fd);
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static uint64_t total(void)
{
	uint64_t found = 0;
	for (size_t index = 1; index < words; index++)
		found = found * 31 + memory[index];
	return found;
}

static uint64_t *map(void)
{
	void *found = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (found == MAP_FAILED)
		abort();
	return found;
}

static void open_devices(void)
{
	DIR *dev = opendir("/dev");
	uint64_t minors = 0;
	opened = 0;
	for (struct dirent *entry; dev && (entry = readdir(dev));) {
		if (strncmp(entry->d_name, "nvidia", 6))
			continue;
		files[opened] = openat(dirfd(dev), entry->d_name, O_RDWR | O_CLOEXEC);
		if (files[opened++] < 0)
			abort();
		if (entry->d_name[6] >= '0' && entry->d_name[6] <= '9')
			minors |= 1ull << atoi(entry->d_name + 6);
	}
	closedir(dev);
	slots[MINORS] = minors;
	slots[OPEN] = opened;
}

static void take_part(const char *call)
{
	// One that does not fit comes from a caller that did not know of another's that was under way.
	if (call[0] == 'c' && !away) {
		away = 1;
		pthread_mutex_lock(&using);
		held = 1;
		saved = map();
		memcpy(saved, memory, words * 8);
		munmap(memory, words * 8);
		while (opened)
			close(files[--opened]);
		slots[OPEN] = 0;
		slots[CHECKPOINTS]++;
		pthread_mutex_unlock(&using);
		write_text("state", "2");
	} else if (call[0] == 'r' && away) {
		slots[TICKS_AT_RESTORE] = slots[TICKS];
		open_devices();
		memory = map();
		memcpy(memory, saved, words * 8);
		munmap(saved, words * 8);
		slots[BAD] += total() != sum || memory[0] != slots[USES];
		slots[RESTORES]++;
		away = 0;
		write_text("state", "1");
	} else if (call[0] == 'u' && !away) {
		slots[UNLOCKS]++;
		held = 0;
		write_text("state", "0");
	}
}

static void *restore(void *unused)
{
	char ask[64], taken[64], answer[64], call[16] = "";
	(void)unused;
	sprintf(call, "%d", gettid());
	write_text("thread", call);
	write_text("asks", "");
	write_text("state", "0");
	slots[READY] = 1;
	name_of(ask, "ask");
	name_of(taken, "taken");
	name_of(answer, "answer");
	for (;; nap()) {
		if (rename(ask, taken) < 0)
			continue;
		int fd = open(taken, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || read(fd, call, sizeof(call) - 1) <= 0)
			abort();
		close(fd);
		take_part(call);
		rename(taken, answer);
	}
}

static void count(void)
{
	char name[64];
	int fd = open(name_of(name, "counts"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || ftruncate(fd, 512) < 0)
		abort();
	slots = mmap(NULL, 512, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (slots == MAP_FAILED || getentropy(&seed, sizeof(seed)) < 0)
		abort();
	slots[BOOT] = seed |= 1;
}

static void begin(void)
{
	pthread_t thread;
	count();
	open_devices();
	memory = map();
	for (size_t index = 1; index < words; index++)
		memory[index] = next(&seed);
	sum = total();
	if (pthread_create(&thread, NULL, restore, NULL))
		abort();
}

static void work(void)
{
	for (;; nap()) {
		slots[TICKS]++;
		pthread_mutex_lock(&using);
		if (!held && memory) {
			slots[USES] = ++memory[0];
			if (slots[USES] % 64 == 0)
				slots[BAD] += total() != sum;
		}
		pthread_mutex_unlock(&using);
	}
}

int main(int argc, char **argv)
{
	int second = 0, forked = 0;
	signal(SIGCHLD, SIG_IGN);
	for (int index = 1; index < argc; index++) {
		if (!strcmp(argv[index], "large"))
			words = 12 << 20;
		second |= !strcmp(argv[index], "second");
		forked |= !strcmp(argv[index], "forked");
		if (!strcmp(argv[index], "socket") && socket(AF_VSOCK, SOCK_STREAM, 0) < 0)
			return 3;
		char parameters[120] = "";
		if (!strcmp(argv[index], "io_uring") && syscall(SYS_io_uring_setup, 4, parameters) < 0)
			return 4;
	}
	if (second && fork() == 0) {
		begin();
		work();
	}
	begin();
	if (forked && fork() == 0) {
		memory = NULL;
		count();
		slots[READY] = 1;
		work();
	}
	work();
}
