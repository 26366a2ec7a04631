// A process of several threads that counts what each has done, in a file that others can map. One is the restore thread, as the
// NVIDIA driver calls it: it takes part in the calls of the fake libcuda.c. Usage: threads FOLDER WORKERS main|other
//
//   FOLDER/PID.counts   64 slots of 8 bytes, see below
//   FOLDER/PID.ask      the restore thread renames it to PID.answer; before that, when FOLDER/PID.spawns is there, it starts
//                       a thread, waits until that runs, and leaves it running; with "blocking" in it under blocked signals
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { READY, RESTORE_TID, RESTORE_COUNT, HANDLED, HANDLED_BY, SPAWNED_TID, SPAWNED_COUNT, WORKER };

static volatile uint64_t *slots;
static const char *folder;

static void nap(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 300000 }, NULL);
}

static void handler(int number)
{
	(void)number;
	slots[HANDLED]++;
	slots[HANDLED_BY] = gettid();
}

static void *worker(void *slot)
{
	for (;; nap())
		slots[(uintptr_t)slot]++;
	return NULL;
}

static void *spawned(void *unused)
{
	(void)unused;
	slots[SPAWNED_TID] = gettid();
	return worker((void *)SPAWNED_COUNT);
}

static void spawn(const char *flag)
{
	char text[16] = "";
	int fd = open(flag, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (read(fd, text, sizeof(text) - 1) < 0)
		abort();
	close(fd);
	unlink(flag);
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, text[0] == 'b' ? &all : NULL, &before);
	pthread_t thread;
	if (pthread_create(&thread, NULL, spawned, NULL))
		abort();
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	while (slots[SPAWNED_COUNT] < 3)
		nap();
}

static void *restore(void *unused)
{
	(void)unused;
	char ask[512], answer[512], flag[512];
	snprintf(ask, sizeof(ask), "%s/%d.ask", folder, getpid());
	snprintf(answer, sizeof(answer), "%s/%d.answer", folder, getpid());
	snprintf(flag, sizeof(flag), "%s/%d.spawns", folder, getpid());
	sigset_t some;
	sigemptyset(&some);
	sigaddset(&some, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &some, NULL);
	slots[RESTORE_TID] = gettid();
	for (;; nap()) {
		slots[RESTORE_COUNT]++;
		if (access(ask, F_OK) == 0) {
			spawn(flag);
			rename(ask, answer);
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	char name[512];
	if (argc != 4)
		return 2;
	folder = argv[1];
	snprintf(name, sizeof(name), "%s/%d.counts", folder, getpid());
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || ftruncate(fd, 512) < 0)
		return 3;
	slots = mmap(NULL, 512, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (slots == MAP_FAILED)
		return 4;
	signal(SIGUSR1, handler);
	pthread_t thread;
	for (uintptr_t number = 0; number < strtoul(argv[2], NULL, 10); number++)
		if (pthread_create(&thread, NULL, worker, (void *)(WORKER + number)))
			return 5;
	if (!strcmp(argv[3], "other") && pthread_create(&thread, NULL, restore, NULL))
		return 6;
	slots[READY] = 1;
	if (!strcmp(argv[3], "main"))
		restore(NULL);
	worker((void *)(uintptr_t)(WORKER + strtoul(argv[2], NULL, 10)));
}
