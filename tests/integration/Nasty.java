import java.nio.ByteBuffer;
import java.nio.file.*;
import java.util.*;

/** A JVM with arrays, maps, direct buffers and threads; it verifies all of them after a restore, and collects garbage. */
public class Nasty {
    static byte[] bytes(int seed, int size) {
        byte[] data = new byte[size];
        new Random(seed).nextBytes(data);
        return data;
    }

    public static void main(String[] words) throws Exception {
        Path folder = Paths.get(words[0]);
        List<byte[]> arrays = new ArrayList<>();
        Map<String, Integer> map = new HashMap<>();
        for (int i = 0; i < 60; i++) arrays.add(bytes(i, 1 << 20));
        for (int i = 0; i < 100000; i++) map.put("key " + i, i);
        ByteBuffer direct = ByteBuffer.allocateDirect(16 << 20);
        direct.put(bytes(77, 16 << 20));
        int[] counts = new int[4];
        Thread[] threads = new Thread[4];
        boolean[] go = {false};
        for (int n = 0; n < 4; n++) {
            int number = n;
            threads[n] = new Thread(() -> {
                synchronized (go) {
                    while (!go[0]) {
                        try { go.wait(); } catch (InterruptedException error) { return; }
                    }
                }
                counts[number] = Arrays.hashCode(arrays.get(number));
            });
            threads[n].start();
        }
        Files.createFile(folder.resolve("ready"));
        while (!Files.exists(folder.resolve("go"))) Thread.sleep(20);
        String wrong = "";
        for (int round = 0; round < 2; round++) {
            for (int i = 0; i < 60; i++) if (!Arrays.equals(arrays.get(i), bytes(i, 1 << 20))) wrong += "array " + i + "; ";
            for (int i = 0; i < 100000; i++) if (map.get("key " + i) != i) wrong += "key " + i + "; ";
            byte[] found = new byte[16 << 20];
            direct.rewind();
            direct.get(found);
            if (!Arrays.equals(found, bytes(77, 16 << 20))) wrong += "direct buffer; ";
            for (int i = 0; i < 400; i++) {
                byte[] fresh = new byte[1 << 20];
                if (!Arrays.equals(fresh, new byte[fresh.length])) wrong += "new array; ";
            }
            System.gc();
        }
        synchronized (go) { go[0] = true; go.notifyAll(); }
        for (Thread thread : threads) thread.join();
        for (int n = 0; n < 4; n++) if (counts[n] != Arrays.hashCode(bytes(n, 1 << 20))) wrong += "thread " + n + "; ";
        Files.writeString(folder.resolve("answer.part"), wrong.isEmpty() ? "ok" : wrong);
        Files.move(folder.resolve("answer.part"), folder.resolve("answer"));
    }
}
