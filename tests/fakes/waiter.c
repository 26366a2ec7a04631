/*
 * A process and a child that it forked, which holds the parent's open files and mappings of a device and waits.
 *
 *     waiter MODE DEVICE
 *
 * The parent opens DEVICE twice (the second without close-on-exec), maps it twice, forks, writes "child PID" and waits for the
 * child. The child waits as MODE says and writes what came of it: the call's result, its errno, and more.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static unsigned futex_word = 1;
static volatile sig_atomic_t ticks;

static void tick(int number)
{
	(void)number;
	ticks++;
}

static void *wake_when_told(void *unused)
{
	char byte;

	(void)unused;
	if (read(0, &byte, 1) == 1) {
		__atomic_store_n(&futex_word, 2, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1, NULL, NULL, 0);
	}
	return NULL;
}

static void say(const char *what, long result)
{
	printf("%s %ld %d\n", what, result, result < 0 ? errno : 0);
}

/* Integer and floating point work whose result any lost register changes; ends when a byte can be read. */
static void spin(void)
{
	struct pollfd ready = { .fd = 0, .events = POLLIN };
	unsigned long sum = 0, wanted = 0, rounds = 0;
	double series = 0, half = 0;

	for (int i = 0; i < 1000000; i++) {
		wanted = wanted * 31 + (unsigned long)i;
		half += 1.0 / (1.0 + i);
	}
	do {
		sum = 0;
		series = 0;
		for (int i = 0; i < 1000000; i++) {
			sum = sum * 31 + (unsigned long)i;
			series += 1.0 / (1.0 + i);
		}
		rounds++;
	} while (sum == wanted && series == half && poll(&ready, 1, 0) <= 0);
	printf("spin %d 0 %d\n", sum == wanted && series == half, rounds > 0);
}

static void wait_as(const char *mode)
{
	struct timespec two = { .tv_sec = 2 };
	struct itimerval often = { { 0, 1000 }, { 0, 1000 } };
	char byte = 0;
	pthread_t thread;

	if (!strcmp(mode, "read")) {
		long result = read(0, &byte, 1);
		say("read", result);
		printf("byte %c\n", byte);
	} else if (!strcmp(mode, "nanosleep")) {
		say("nanosleep", nanosleep(&two, NULL));
	} else if (!strcmp(mode, "poll")) {
		say("poll", poll(NULL, 0, 2000));
	} else if (!strcmp(mode, "futex-timeout")) {
		say("futex", syscall(SYS_futex, &futex_word, FUTEX_WAIT, 1, &two, NULL, 0));
	} else if (!strcmp(mode, "futex")) {
		pthread_create(&thread, NULL, wake_when_told, NULL);
		say("futex", syscall(SYS_futex, &futex_word, FUTEX_WAIT, 1, NULL, NULL, 0));
		pthread_join(thread, NULL);
	} else if (!strcmp(mode, "sigsuspend")) {
		sigset_t all;
		sigfillset(&all);
		signal(SIGUSR1, tick);
		sigprocmask(SIG_BLOCK, &all, NULL);
		sigdelset(&all, SIGUSR1);
		say("sigsuspend", sigsuspend(&all));
		sigprocmask(SIG_BLOCK, NULL, &all);
		printf("blocked %d ticks %d\n", sigismember(&all, SIGUSR1), (int)ticks);
	} else if (!strcmp(mode, "spin")) {
		spin();
	} else if (!strcmp(mode, "signals")) {
		signal(SIGALRM, tick);
		setitimer(ITIMER_REAL, &often, NULL);
		spin();
		printf("ticked %d\n", ticks > 0);
	}
	fflush(stdout);
}

int main(int argc, char **argv)
{
	pid_t child;
	int first, second;

	if (argc != 3)
		return 2;
	first = open(argv[2], O_RDWR | O_CLOEXEC);
	second = open(argv[2], O_RDWR);
	if (first < 0 || second < 0 || mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE, first, 0) == MAP_FAILED ||
	    mmap(NULL, 8192, PROT_READ, MAP_PRIVATE, second, 0) == MAP_FAILED)
		return 3;
	if (!strcmp(argv[1], "vfork")) {
		char byte;
		printf("parent %d\n", getpid());
		fflush(stdout);
		if (vfork() == 0) {
			syscall(SYS_read, 0, &byte, 1);
			_exit(0);
		}
		return 0;
	}
	child = fork();
	if (child == 0) {
		wait_as(argv[1]);
		_exit(0);
	}
	printf("child %d\n", child);
	fflush(stdout);
	return waitpid(child, NULL, 0) == child ? 0 : 4;
}
