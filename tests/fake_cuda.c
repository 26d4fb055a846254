/* A libcuda.so.1 for machines without a GPU: as many cards as FAKE_CUDA_CARDS names ("name|major.minor;..."), of which
   CUDA_VISIBLE_DEVICES shows what the real one would show: numbers or UUIDs, up to the first that names no card. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char cards[16][128], order[16];
static int major[16], minor[16], num_cards, num_shown;

static void uuid_of(int card, unsigned char *uuid) {
    memset(uuid, 0xA0 + card, 16);
}

static int card_of(const char *part) {
    if (!strncmp(part, "GPU-", 4) || !strncmp(part, "MIG-", 4)) {
        char start[9];
        for (int card = 0; card < num_cards; card++) {
            snprintf(start, sizeof start, "%02x%02x", 0xA0 + card, 0xA0 + card);
            if (!strncmp(part + 4, start, 4)) return card;
        }
        return -1;
    }
    char *end;
    long card = strtol(part, &end, 10);
    return end == part || card < 0 || card >= num_cards ? -1 : (int)card;
}

int cuDriverGetVersion(int *version) {
    *version = atoi(getenv("FAKE_CUDA_VERSION"));
    return 0;
}

int cuInit(unsigned flags) {
    (void)flags;
    if (getenv("FAKE_CUDA_INIT")) return atoi(getenv("FAKE_CUDA_INIT"));
    char *listed = strdup(getenv("FAKE_CUDA_CARDS")), *save = NULL;
    for (char *card = strtok_r(listed, ";", &save); card; card = strtok_r(NULL, ";", &save), num_cards++)
        sscanf(card, "%127[^|]|%d.%d", cards[num_cards], &major[num_cards], &minor[num_cards]);
    const char *mask = getenv("CUDA_VISIBLE_DEVICES");
    if (!mask) {
        for (; num_shown < num_cards; num_shown++) order[num_shown] = (char)num_shown;
    } else {
        char *parts = strdup(mask);
        for (char *part = strtok_r(parts, ",", &save); part; part = strtok_r(NULL, ",", &save)) {
            int card = card_of(part);
            if (card < 0) break;
            if (memchr(order, card, num_shown)) { /* a card twice: none at all */
                num_shown = 0;
                break;
            }
            order[num_shown++] = (char)card;
        }
    }
    return num_shown ? 0 : 100;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == 100 ? "no CUDA-capable device is detected" : "system not yet initialized";
    return 0;
}

int cuDeviceGetCount(int *count) { *count = num_shown; return 0; }
int cuDeviceGet(int *device, int index) { *device = order[index]; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "%s", cards[device]); return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { uuid_of(device, uuid); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 80UL << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? major[device] : minor[device];
    return 0;
}
