"""Words that name the speaker of a turn or the part of a prompt, in the languages of data sets."""

from __future__ import annotations

_USER = """
user human prompter customer client benutzer nutzer mensch utilisateur
humain usuario humano utente gpt4_correct_user umano usuário usuari
gebruiker użytkownik człowiek uživatel používateľ användare bruger bruker
käyttäjä felhasználó utilizator kullanıcı пользователь человек користувач
людина потребител корисник χρήστης المستخدم مستخدم إنسان משתמש کاربر صارف
उपयोगकर्ता मानव ব্যবহারকারী பயனர் వినియోగదారు 用户 用戶 使用者 人类 人類 ユーザー 人間 사용자 인간
ผู้ใช้ pengguna người_dùng
"""
_ASSISTANT = """
assistant ai bot chatbot gpt chatgpt claude gemini llama falcon vicuna model
agent assistent asistente assistente asystent pomocnik asistent avustaja
asszisztens asistan ассистент помощник асистент помічник βοηθός المساعد
مساعد עוזר دستیار सहायक সহকারী உதவியாளர் సహాయకుడు 助手 助理 アシスタント 어시스턴트 비서
ผู้ช่วย asisten pembantu trợ_lý ai_assistant gpt-4 gpt4 mm
gpt4_correct_assistant
"""
_OTHER = "system sys developer tool turn round système sistema система 系统 システム 시스템"
_ASKING = """
q h question questions instruction instructions instruct prompt query input
frage anweisung pregunta domanda pergunta vraag pytanie вопрос 问 問 问题 質問 질문
سؤال प्रश्न instrução istruzione instrucción
"""
_ANSWERING = """
a answer response reply output completion antwort réponse respuesta risposta
resposta antwoord odpowiedź ответ відповідь 答 回答 答案 답변 جواب उत्तर
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(word.replace("_", " ") for word in text.split())


#: Speakers whose turn asks, and whose turn replies.
USERS, ASSISTANTS = _words(_USER), _words(_ASSISTANT)
#: Parts of a prompt that are headings of other texts too: "Question", "Answer".
ASKING, ANSWERING = _words(_ASKING), _words(_ANSWERING)
#: Who reads the page of a chat, and what captions of its messages say.
_READERS = frozenset(("you", "i"))
_SAYING = ("said", "says", "asked", "asks", "wrote", "writes", "responded", "replied")
_SPEAKERS = USERS | ASSISTANTS | _words(_OTHER)
_LABELS = ASKING | ANSWERING


def base_word(name: str) -> str:
    """Return a name in lower case without blanks and a number behind it: "User 1" is user."""
    return " ".join(name.casefold().split()).rstrip("0123456789 #")


def is_speaker(name: str) -> bool:
    """Return whether a name is a speaker's: user, Assistent, 用户; "ChatGPT said" on a page."""
    word = base_word(name)
    return word in _SPEAKERS or speaker_on_page(word) in _SPEAKERS | _READERS


def is_user(name: str) -> bool:
    """Return whether a name is one of who asks: user, Nutzer; "You said" on a page."""
    word = base_word(name)
    return word in USERS or speaker_on_page(word) in USERS | _READERS


def speaker_on_page(word: str) -> str | None:
    """Return the name of a caption such as "ChatGPT said", in lower case."""
    name, _, verb = word.rpartition(" ")
    return name if verb in _SAYING else None


def is_label(name: str) -> bool:
    """Return whether a name is one of a part of a prompt: Question, Antwort, output."""
    return base_word(name) in _LABELS
