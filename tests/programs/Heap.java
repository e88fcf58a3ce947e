// SPDX-License-Identifier: MIT
// A Java program that allocates all the time, keeps some of it, and checks what it kept.
import java.util.Random;

public class Heap extends Thread {
    static volatile long rounds, wrong;
    final Random random;
    final byte[][] kept = new byte[2000][];

    Heap(long seed) { random = new Random(seed); }

    static byte sum(byte[] bytes) {
        byte sum = 0;
        for (int i = 1; i < bytes.length; i++)
            sum += bytes[i];
        return sum;
    }

    public void run() {
        while (true) {
            int which = random.nextInt(kept.length);
            byte[] old = kept[which];
            if (old != null && old[0] != sum(old))
                wrong++;
            byte[] fresh = new byte[64 + random.nextInt(4000)];
            random.nextBytes(fresh);
            fresh[0] = sum(fresh);
            kept[which] = fresh;
            rounds++;
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (int i = 0; i < 2; i++) {
            Heap thread = new Heap(i);
            thread.setDaemon(true);
            thread.start();
        }
        System.out.println("up");
        while (System.in.read() != -1) {
            long then = rounds, end = System.nanoTime() + 20000000000L;
            while (rounds < then + 100 && System.nanoTime() < end)
                Thread.sleep(1);
            System.out.println(rounds >= then + 100 && wrong == 0 ? "well" : "wrong");
        }
    }
}
