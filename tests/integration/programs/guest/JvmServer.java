import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.security.MessageDigest;
import java.security.SecureRandom;
import java.util.HexFormat;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.Collectors;

/** HTTP/1.1 by the JVM: a thread for each request of a pool, state on the heap, garbage for the collector, a stream. */
public class JvmServer {
    static final AtomicLong count = new AtomicLong();
    static final Map<String, String> kept = new TreeMap<>();
    static String boot;

    public static void main(String[] words) throws Exception {
        byte[] random = new byte[8];
        new SecureRandom().nextBytes(random);
        boot = HexFormat.of().formatHex(random);
        HttpServer server = HttpServer.create(new InetSocketAddress(words[0], Integer.parseInt(words[1])), 64);
        server.setExecutor(Executors.newCachedThreadPool());
        server.createContext("/", JvmServer::handle);
        server.start();
        Runtime.getRuntime().addShutdownHook(new Thread(() -> server.stop(0)));
    }

    static void handle(HttpExchange exchange) throws IOException {
        String path = exchange.getRequestURI().getPath();
        String query = exchange.getRequestURI().getQuery();
        byte[] body = exchange.getRequestBody().readAllBytes();
        try (exchange) {
            switch (path) {
                case "/state" -> answer(exchange, state());
                case "/count" -> answer(exchange, "{\"count\": " + count.incrementAndGet() + "}");
                case "/put" -> {
                    synchronized (kept) {
                        kept.put(query, new String(body));
                    }
                    answer(exchange, "{}");
                }
                case "/digest" -> answer(exchange, digest(body));
                case "/stream" -> stream(exchange, Integer.parseInt(query));
                default -> exchange.sendResponseHeaders(404, -1);
            }
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    static String state() {
        synchronized (kept) {
            String pairs = kept.entrySet().stream()
                    .map(entry -> "\"" + entry.getKey() + "\": \"" + entry.getValue() + "\"")
                    .collect(Collectors.joining(", "));
            return "{\"boot\": \"" + boot + "\", \"count\": " + count.get() + ", \"kept\": {" + pairs + "}}";
        }
    }

    static String digest(byte[] body) {
        try {
            return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(body.clone()));
        } catch (java.security.NoSuchAlgorithmException missing) {
            throw new IllegalStateException(missing);
        }
    }

    static void stream(HttpExchange exchange, int lines) throws IOException, InterruptedException {
        exchange.sendResponseHeaders(200, 0);
        for (int number = 0; number < lines; number++) {
            exchange.getResponseBody().write((number + "\n").getBytes());
            exchange.getResponseBody().flush();
            Thread.sleep(20);
        }
    }

    static void answer(HttpExchange exchange, String text) throws IOException {
        exchange.sendResponseHeaders(200, text.length());
        exchange.getResponseBody().write(text.getBytes());
    }
}
