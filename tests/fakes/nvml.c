// Stands for libnvidia-ml.so.1: the calls that smr.shim.gpu.inventory makes through pynvml, over two files of $SMR_FAKE_CUDA.
//
//   gpus    the driver's release; then a line for each GPU: UUID|NAME|MINOR|CAPABILITY|TOTAL|FREE|COMPUTE MODE|FAULT (an nvmlReturn)
//   procs   a line for each process: MINOR PID BYTES
//
// What is not here pynvml reports as not supported by this driver.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, MOST = 16 };

struct gpu {
	char uuid[64], name[64];
	int minor, major_capability, minor_capability;
	unsigned long long total, free;
	int mode, fault;
};

struct process {
	unsigned pid;
	unsigned long long bytes;
	unsigned gpu_instance, compute_instance;
};

static struct gpu gpus[MOST];
static char driver[80];
static int count;

static FILE *table(const char *name)
{
	char path[512];
	snprintf(path, sizeof(path), "%s/%s", getenv("SMR_FAKE_CUDA"), name);
	return fopen(path, "re");
}

int nvmlInitWithFlags(unsigned flags)
{
	(void)flags;
	FILE *file = table("gpus");
	if (!file)
		return DRIVER_NOT_LOADED;
	count = 0;
	if (fscanf(file, "%79s\n", driver) != 1)
		abort();
	for (struct gpu *one = gpus; count < MOST; one++, count++)
		if (fscanf(file, "%63[^|]|%63[^|]|%d|%d.%d|%llu|%llu|%d|%d\n", one->uuid, one->name, &one->minor, &one->major_capability,
			   &one->minor_capability, &one->total, &one->free, &one->mode, &one->fault) != 9)
			break;
	fclose(file);
	return OK;
}

int nvmlShutdown(void)
{
	return OK;
}

const char *nvmlErrorString(int number)
{
	return number == 15 ? "GPU is lost" : number == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "an error";
}

int nvmlSystemGetDriverVersion(char *out, unsigned size)
{
	snprintf(out, size, "%s", driver);
	return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
	*version = 13000;
	return OK;
}

int nvmlDeviceGetCount_v2(unsigned *out)
{
	*out = count;
	return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct gpu **out)
{
	if (index >= (unsigned)count)
		return INVALID_ARGUMENT;
	*out = &gpus[index];
	return gpus[index].fault;
}

int nvmlDeviceGetUUID(const struct gpu *one, char *out, unsigned size)
{
	snprintf(out, size, "%s", one->uuid);
	return OK;
}

int nvmlDeviceGetName(const struct gpu *one, char *out, unsigned size)
{
	snprintf(out, size, "%s", one->name);
	return OK;
}

int nvmlDeviceGetMinorNumber(const struct gpu *one, unsigned *out)
{
	*out = one->minor;
	return OK;
}

int nvmlDeviceGetCudaComputeCapability(const struct gpu *one, int *major, int *minor)
{
	*major = one->major_capability;
	*minor = one->minor_capability;
	return OK;
}

int nvmlDeviceGetMemoryInfo(const struct gpu *one, unsigned long long out[3])
{
	out[0] = one->total;
	out[1] = one->free;
	out[2] = one->total - one->free;
	return OK;
}

int nvmlDeviceGetComputeMode(const struct gpu *one, int *out)
{
	*out = one->mode;
	return OK;
}

int nvmlDeviceGetPersistenceMode(const struct gpu *one, int *out)
{
	(void)one;
	*out = 1;
	return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const struct gpu *one, unsigned *size, struct process *out)
{
	struct process found[64];
	unsigned number = 0;
	int minor;
	FILE *file = table("procs");
	memset(found, 0, sizeof(found));
	while (file && number < 64 && fscanf(file, "%d %u %llu", &minor, &found[number].pid, &found[number].bytes) == 3)
		number += minor == one->minor;
	if (file)
		fclose(file);
	int fits = number <= *size;
	if (fits && number)
		memcpy(out, found, number * sizeof(*out));
	*size = number;
	return fits ? OK : INSUFFICIENT_SIZE;
}
